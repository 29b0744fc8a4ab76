"""Reports of a run: pictures by matplotlib (`pictures`), and rollouts token by token as a page for any browser (`tokens`)."""
