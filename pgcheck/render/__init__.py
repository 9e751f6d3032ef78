"""Words, tables and pages: the only place where numbers become sentences."""
