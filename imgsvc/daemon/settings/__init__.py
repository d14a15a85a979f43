"""The configuration as each package takes it. Packages do not know the configuration; these modules know both."""
