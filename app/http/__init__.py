"""The HTTP interface: requests into typed queries, answers and errors into responses."""
