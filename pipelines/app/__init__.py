"""iptv2-app: a local web page that generates images, restores photographs and compares models."""
