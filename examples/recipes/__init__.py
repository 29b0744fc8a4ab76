"""The set-ups of the Lightning OPD paper with lopd."""
