"""The embedded fleet, the sample application and its traffic."""
