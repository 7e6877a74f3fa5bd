"""The spatial application: tissue sections in, domains out, over HTTP and on a small web page, on Ray Serve."""
