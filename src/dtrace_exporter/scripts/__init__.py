"""A user's own D scripts: what they aggregate, the text that runs, and the rows that it prints."""
