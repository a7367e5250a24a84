"""The web side: metrics, landing page, health and reload, and who may use them."""
