"""The playground and the steering report: each one HTML file, put together from the files of this folder."""
