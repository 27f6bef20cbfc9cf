"""The command line: flags, messages and exit statuses. Nothing below this package knows of them."""
