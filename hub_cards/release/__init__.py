"""Everything a variant's or a family's repositories hold, built before anything is sent."""
