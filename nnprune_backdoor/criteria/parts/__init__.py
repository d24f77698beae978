"""What several criteria share."""
