//go:build upgrade

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomodule/redigo/redis"
)

// programBuild is a build of the program, by which a webhook decides or a pod's containers run.
type programBuild struct {
	image string // by which pods name it
	path  string
}

// git asks git about this repository.
func git(args ...string) (string, error) {
	var errText bytes.Buffer
	c := exec.Command("git", args...)
	c.Stderr = &errText
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, errText.String())
	}
	return strings.TrimSpace(string(out)), err
}

// commitBefore is the commit of the program that this one replaces: that of the last release before it, or HEAD until there is one.
func commitBefore() (commit string, released bool, err error) {
	const help = "this test needs the history of the repository, with its tags: "
	shallow, err := git("rev-parse", "--is-shallow-repository")
	if err != nil {
		return "", false, fmt.Errorf(help+"clone it with git, and run the test there: %w", err)
	}
	if shallow == "true" {
		return "", false, errors.New(help + "git fetch --unshallow --tags (fetch-depth: 0 of actions/checkout)")
	}
	tags, err := git("for-each-ref", "--merged=HEAD", "--no-contains=HEAD", "--sort=-version:refname", "--format=%(refname:short)", "refs/tags/v*")
	if err != nil {
		return "", false, err
	}
	if tags == "" {
		return "HEAD", false, nil
	}
	return strings.Fields(tags)[0], true, nil
}

// export writes the files of a commit into a folder.
func export(commit, folder string) error {
	var errText bytes.Buffer
	archive := exec.Command("git", "archive", "--format=tar", commit)
	archive.Stderr = &errText
	out, err := archive.StdoutPipe()
	if err == nil {
		err = archive.Start()
	}
	if err == nil {
		err = errors.Join(untar(out, folder), archive.Wait())
	}
	if err != nil {
		return fmt.Errorf("git archive %s: %w: %s", commit, err, errText.String())
	}
	return nil
}

func untar(from io.Reader, folder string) error {
	for files := tar.NewReader(from); ; {
		file, err := files.Next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, from)
			return err
		}
		if err != nil {
			return err
		}
		name := filepath.Join(folder, filepath.FromSlash(file.Name))
		switch file.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		case tar.TypeReg:
			var text []byte
			if text, err = io.ReadAll(files); err == nil {
				err = os.WriteFile(name, text, fs.FileMode(file.Mode)&0o777)
			}
		}
		if err != nil {
			return err
		}
	}
}

// deployedUsers are the users that a folder's deploy/ makes in the Redis that holds the tokens, and in those for the lock, as
// arguments of redis-server: of the webhook, and of the sidecars of a namespace; and one for the tests.
func deployedUsers(t *testing.T, folder, namespace string) (queue, lock []string) {
	t.Helper()
	passwords := t.TempDir()
	must(t, os.WriteFile(filepath.Join(passwords, namespace), []byte(testPassword+"\n"), 0o600))
	namespaces := strings.ReplaceAll(scriptOf(t, folder, "namespaces"), "/etc/redis-namespaces", passwords)
	read := func(server, port string) []string {
		sidecars, err := exec.Command("sh", "-c", namespaces+"\nusers "+port).Output()
		must(t, err)
		args := strings.Fields("--user tester on >" + testPassword + " ~* &* +@all")
		for line := range strings.Lines(scriptOf(t, folder, server) + string(sidecars)) {
			words := strings.Fields(line)
			if len(words) > 3 && words[0] == "user" && (words[1] == "webhook" || words[1] == namespaceUser(namespace)) && words[2] == "on" {
				args = append(append(args, "--user", words[1], "on", ">"+testPassword), words[4:]...) // words[3] is the password
			}
		}
		if n := strings.Count(strings.Join(args, " "), "--user"); n != 3 {
			t.Fatalf("the script %s of %s makes %d users where two are wanted: %q", server, folder, n-1, args)
		}
		return append(args, "--user", "default", "on", "resetpass", "~*", "&*", "+@all") // see redis-scripts.yaml
	}
	return read("redis", "6379"), read("lock", "6380")
}

// scriptOf is a script of a folder's deploy/base/redis-scripts.yaml.
func scriptOf(t *testing.T, folder, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "deploy/base/redis-scripts.yaml"))
	must(t, err)
	_, rest, ok := strings.Cut(string(text), "\n  "+name+": |\n")
	if !ok {
		t.Fatalf("no script %q in deploy/base/redis-scripts.yaml of %s", name, folder)
	}
	var script strings.Builder
	for line := range strings.Lines(rest) {
		if strings.TrimSpace(line) != "" && !strings.HasPrefix(line, "    ") {
			break
		}
		script.WriteString(strings.TrimPrefix(line, "    "))
	}
	return script.String()
}

// startRedisWith starts a redis-server with users.
func startRedisWith(t *testing.T, users []string) *redisServer {
	t.Helper()
	listen := func(port string) []string { return append(plain(port), users...) }
	r, err := launchRedisOf("", t.TempDir(), listen, redis.DialUsername("tester"), redis.DialPassword(testPassword))
	must(t, err)
	t.Cleanup(r.stop)
	return r
}
