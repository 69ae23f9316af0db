"""A page on which one sees what a model looks at."""
