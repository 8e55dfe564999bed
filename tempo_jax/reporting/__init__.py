"""What `explain` says of a plan: figures, costs, checks, as text and as a page. Untrusted."""
