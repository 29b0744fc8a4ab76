"""Small models of a task with a verifier, built from seeds: where the paper's claims and lopd's guards are put to the test."""
