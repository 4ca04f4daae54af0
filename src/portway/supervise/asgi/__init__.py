"""`portway asgi`: an ASGI server, on uvicorn's own classes, whose connections move to the next generation on a reload.

Run by `portway asgi APP`, or as the worker of any service: ``portway run ... -- python -m portway.supervise.asgi APP``.
"""
