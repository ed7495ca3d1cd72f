"""Results for others: repositories of the hub, exports for servers, and checks of a running server."""
