"""What could a broken or hostile peer send that does more than end its own connection?"""
