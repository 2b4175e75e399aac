"""Low-rank factorization: what layers give out (`responses`), and which rank each is split at (`ranks`)."""
