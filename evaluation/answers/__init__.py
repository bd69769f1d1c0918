"""How answers are had: from a variant at every m, from a server, from other tools; kept in a journal."""
