"""Factorization: what layers see and give out (`responses`), their forms (`forms`), which one each takes (`ranks`, `faster`)."""
