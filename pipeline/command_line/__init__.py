"""The command line's parts: options from config fields, settings files, checks of paths.

Nothing here imports torch.
"""
