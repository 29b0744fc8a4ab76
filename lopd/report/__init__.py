"""Reports of a run: pictures by matplotlib (`pictures`); pages for any browser of a whole run (`run`) and of its tokens (`tokens`)."""
