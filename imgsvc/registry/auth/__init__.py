"""Who asks: credentials, and answers to challenges.

credentials     the node's own, in order of precedence
dockerconfig    config.json and auth.json as data
helpers         programs that hand out credentials
challenge       WWW-Authenticate, scopes, token answers as data
authorizer      Basic and Bearer, with a token cache
"""
