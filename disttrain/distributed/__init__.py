"""Who a worker is, and how workers talk."""
