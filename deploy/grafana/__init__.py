"""Dashboards for Grafana, written by `python -m deploy.grafana.dashboards`."""
