"""The playground and the steering report: each is one HTML file, assembled from the files of this folder."""
