"""Where dense weights come from: the files that a path means, their containers, encodings and names."""
