"""How long will it take: a simulator of many organizations' moves, before the first one moves.

`engine` knows tasks, limits and servers that share themselves, and nothing of organizations.
`lanes` says what a move asks of them, `rates` how much, `cohorts` reads who moves on what, and
`report` shows what came out. Nothing here touches a server.
"""
