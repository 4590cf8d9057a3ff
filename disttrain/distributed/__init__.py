"""Which worker this is, and how workers communicate."""
