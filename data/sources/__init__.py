"""Files, tables and Hub datasets read into the one conversation format."""
