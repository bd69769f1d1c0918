"""A family of variants from scratch in minutes, on one machine and from rendered images."""
