"""Alerts and dashboard, as Prometheus itself understands them."""
