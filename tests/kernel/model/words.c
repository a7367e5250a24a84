/*
 * Reading the words of a script's line.
 */
#include <linux/inet.h>
#include <linux/kstrtox.h>

#include "driver.h"

int split(char *line, struct words *words)
{
	char *word;

	memset(words, 0, sizeof(*words));
	while ((word = strsep(&line, " "))) {
		if (!*word)
			continue;
		if (words->count == WORDS_MOST)
			return -EINVAL;
		words->word[words->count++] = word;
	}
	return 0;
}

/* Return the next word, NULL when there is none. */
char *next_word(struct words *words)
{
	while (words->next < words->count) {
		char *word = words->word[words->next++];

		if (word)
			return word;
	}
	return NULL;
}

/* Take a word that stands alone. */
bool take_flag(struct words *words, const char *flag)
{
	for (int i = words->next; i < words->count; i++) {
		if (words->word[i] && !strcmp(words->word[i], flag)) {
			words->word[i] = NULL;
			return true;
		}
	}
	return false;
}

/* Take the value behind a name, NULL when the name is not there. */
char *take(struct words *words, const char *name)
{
	for (int i = words->next; i + 1 < words->count; i++) {
		char *value = words->word[i + 1];

		if (!words->word[i] || !value || strcmp(words->word[i], name))
			continue;
		words->word[i] = NULL;
		words->word[i + 1] = NULL;
		return value;
	}
	return NULL;
}

int take_number(struct words *words, const char *name, u64 most, u64 *number)
{
	char *value = take(words, name);

	if (!value)
		return 0;
	return kstrtou64(value, 10, number) || *number > most ? -EINVAL : 0;
}

int read_address(const char *text, in6_addr_t *address, bool *v4)
{
	ipaddr_t address4;

	*v4 = !strchr(text, ':');
	if (*v4) {
		if (!in4_pton(text, -1, (u8 *)&address4, -1, NULL))
			return -EINVAL;
		*address = v4_mapped(address4);
		return 0;
	}
	return in6_pton(text, -1, address->_S6_un._S6_u8, -1, NULL) ? 0 : -EINVAL;
}
