"""What is exact, what is fast, and how both are measured."""
