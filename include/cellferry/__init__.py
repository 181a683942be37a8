"""cellferry moves organizations between the cells of a SaaS product while they keep working."""

__version__ = "0.1.0"
