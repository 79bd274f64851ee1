"""The documentation site, its build and its generated pages."""
