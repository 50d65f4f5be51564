"""The live page: its files, the messages it exchanges with the server, and what runs behind one
connection.
"""
