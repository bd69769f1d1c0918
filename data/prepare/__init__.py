"""A training set looked at image by image, and written as shards with a manifest."""
