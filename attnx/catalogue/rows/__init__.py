"""The finished rows, a file a paper, named by its id."""
