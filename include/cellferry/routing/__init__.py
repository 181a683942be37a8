"""What applications use: the route client."""
