"""What runs and label sets have to show: tables and matplotlib figures, for notebooks and pages.

Reading a run needs nothing but the library; figures need the extra ``report``.
"""
