"""Drop-in classes that update at the same steps and with the same decay as their peers.

``install()`` uses these classes where those in :mod:`fastema.compat` differ from the peers in that.
Modules have the same names as in :mod:`fastema.compat`.
"""
