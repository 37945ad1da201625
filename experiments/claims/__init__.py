"""What papers claim, a file a paper, put to tests that a laptop can run."""
