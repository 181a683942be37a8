"""Stores: one kind of data of a cell behind one interface (see `base`)."""
