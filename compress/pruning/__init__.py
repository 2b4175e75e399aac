"""Structured pruning: which channels can go (`surgeon`), what each is worth (`scores`), and how many go (`selection`)."""
