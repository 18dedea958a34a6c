"""uvicorn, with limits on connections and a graceful shutdown."""
