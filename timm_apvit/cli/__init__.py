"""The command line: each command a file, and one place in which errors become a line."""
