"""The control plane's database: cells, routes, migrations, audit, resources."""
