"""The drop-in classes that update when, and with the decay that, their peers would.

``install()`` puts these in the peers' places, where those of the same names one level up differ in
that. Modules are called like those.
"""
