"""iptv2-app: a web page that generates, restores and compares, on this machine alone."""
