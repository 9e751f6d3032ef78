"""Other libraries' own functions as estimators, one file a library; each needs its library installed."""
